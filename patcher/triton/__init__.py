"""Triton: a client for any server, and a real server for this machine."""
