"""Exported models: files for other programs and for the hub of Hugging Face, and back."""
