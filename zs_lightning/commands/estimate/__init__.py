"""What a configuration takes of a card, before anything is loaded."""
