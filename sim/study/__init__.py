"""Studies: questions that take many simulations to answer, asked in one command."""
