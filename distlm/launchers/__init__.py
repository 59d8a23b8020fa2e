"""Code that sends an attempt to a target. One file per target; each is imported only when it is used."""
