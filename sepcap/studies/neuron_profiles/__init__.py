"""What single neurons do: the texts, tokens and logits that belong to them (METHODS 23)."""
