"""Training loops of the shape that users have, with a loss that can be exchanged."""
