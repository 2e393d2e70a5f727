"""Exported models: files for other programs and for the hub of Hugging Face, and back.

Each format is a module with export(trained, out); `reading` reads safetensors, Keras and torch. See
README.md.
"""
