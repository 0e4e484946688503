"""Mask proposals: a picture in, masks out, made by a generator or read from files."""

from .base import Proposals, Proposer

__all__ = ["Proposals", "Proposer"]
