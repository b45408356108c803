"""The only files that touch anything private of the libraries we stand on."""
