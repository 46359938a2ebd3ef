"""How fast bigq is on this machine: linears, a whole model, loading and offloading."""
