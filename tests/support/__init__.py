"""What several tests use: real small things, and slow references."""
