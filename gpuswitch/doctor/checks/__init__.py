"""The checks: small functions from what was seen to what is to be said of it. They read nothing themselves."""
