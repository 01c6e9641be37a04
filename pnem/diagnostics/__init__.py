"""Is inference any good, what is it losing, and would another strategy be better? All in nats."""

from pnem.diagnostics.findings import Finding
from pnem.diagnostics.terms import Terms, elbo_terms, terms_at

__all__ = ["Finding", "Terms", "elbo_terms", "terms_at"]
