"""What may teach a network beside a trained teacher's logits: neighbours in the batch, hints, peers."""
