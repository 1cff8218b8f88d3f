"""Reads data files of several formats and schemas as rows."""
