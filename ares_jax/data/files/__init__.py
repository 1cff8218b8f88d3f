"""Data files as rows: formats and schemas."""
