"""What a paragraph break carries into the next paragraph: activations transferred to another prompt."""
