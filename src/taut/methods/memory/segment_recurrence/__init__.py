"""The method ``memory.segment_recurrence`` and what it alone needs."""
