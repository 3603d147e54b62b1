"""The method ``memory.segment_recurrence`` and the code that only it uses."""
