"""Whether a removed capability is gone: relearning, quantisation, elicitation, and what is left inside."""
