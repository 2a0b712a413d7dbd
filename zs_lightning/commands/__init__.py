"""What the command line runs besides fit, validate and test. Nothing else imports them."""
