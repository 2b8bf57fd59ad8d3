"""Tests mirror the folders; see CONTRIBUTING.md."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The checkout."""
