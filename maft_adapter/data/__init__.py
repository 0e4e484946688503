"""Data sets as users have them on disk, and their splits into seen and unseen classes."""

from .ade20k_847 import ade20k_847_split, register_ade20k_847

__all__ = ["ade20k_847_split", "register_ade20k_847"]
