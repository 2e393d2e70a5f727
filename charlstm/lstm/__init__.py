"""The recurrence: a Flax reference, fused loops, loops in C++, and cuDNN."""
