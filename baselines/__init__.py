"""The methods that the papers compare with, one file for each kind."""
