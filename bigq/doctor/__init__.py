"""Whether this machine and its libraries run what is here, and how: what `bigq doctor` examines."""
