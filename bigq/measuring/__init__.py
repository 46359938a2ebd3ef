"""How long a call takes, how fast this machine moves bytes, and what the machine is."""
