"""The simulated fleet in virtual time, driving the router's own policies."""
