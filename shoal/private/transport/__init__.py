"""Bytes between the two parties: certificates, channels of framed messages, and raw words during inference."""
