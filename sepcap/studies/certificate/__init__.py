"""Whether a removed capability is really gone: relearning, quantisation, elicitation, and what is left inside."""
