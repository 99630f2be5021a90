"""Encoders: image batch in, features out. Only torch and transformers are used here, never Ray."""
