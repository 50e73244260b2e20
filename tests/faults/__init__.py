"""What goes wrong around the server, and what each fault has to come to."""
