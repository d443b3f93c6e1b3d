"""Bridges from other training libraries: problems taken from their scripts, and callbacks that replay schedules there.

Each module needs its library; nothing here is imported before it is used.
"""
