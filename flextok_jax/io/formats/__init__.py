"""Files of other projects <-> our parameters."""
