"""Value-based post-training of language models: one problem, max E[R] - beta * KL(pi || pi_ref), solved in four places."""

__version__ = "0.1.0"
