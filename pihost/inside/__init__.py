"""What runs inside the walls, in the same process as code nobody trusts. The host believes nothing that comes from here."""
