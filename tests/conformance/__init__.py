"""One list of what a client has to do, held against each client, over each transport, direct and through nginx."""
