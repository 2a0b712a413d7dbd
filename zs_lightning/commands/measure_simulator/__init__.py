"""How good a simulated search engine is, before a policy is trained with it."""
