"""One file per verb. They return frozen results and never print."""
