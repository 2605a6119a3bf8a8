"""Bytes between two parties: certificates, framed channels, the format of arrays."""
