"""The recurrence: a Flax reference, a fused implementation and one by cuDNN."""
