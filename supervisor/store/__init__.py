"""The database of the centre: schema, migrations, and one small repository per kind of thing."""
