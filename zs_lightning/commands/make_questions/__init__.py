"""make-questions: questions with answers about a person's own texts."""
