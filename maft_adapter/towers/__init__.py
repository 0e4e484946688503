"""Families of image towers, one module each: `recognise`, then `check` and `patch`, of (visual, start_layer)."""

from . import attention_pool, average, class_token, learned_query

FAMILIES = (class_token, learned_query, attention_pool, average)
