"""The command line `magvit-fast`: one file a command, assembled in main.py."""
