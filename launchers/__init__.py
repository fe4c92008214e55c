"""How the processes of one command start. Each module is one way; none imports torch, so that
launching is instant.

A launcher turns the words of a `hypenet` command and a number of processes into running processes
that know their place from the environment: RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE,
MASTER_ADDR, MASTER_PORT. The command is the same under every launcher.
"""
