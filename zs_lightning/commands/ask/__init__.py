"""Asking a policy by hand: its thoughts, searches and answer in the terminal and as a page."""
