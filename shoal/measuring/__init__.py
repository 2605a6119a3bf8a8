"""Measurements of private inference between two processes on this machine."""
