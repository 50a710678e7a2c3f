"""Pattern text -> Pattern, placement files -> rules, rules x graph -> Plan. Pure: no runtime, no data."""
