"""One GPU: what is known of it, what runs, what recovers it, and who decides."""
