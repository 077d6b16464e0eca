"""The parts of the program that carries an installation out on the machine; `program` puts them together."""
