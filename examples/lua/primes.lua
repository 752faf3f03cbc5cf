-- Runs in the second sandbox, by the Lua that the first one made: writes its result to the file named by its argument.
local primes = {}
for candidate = 2, 50 do
  local prime = true
  for _, divisor in ipairs(primes) do
    prime = prime and candidate % divisor ~= 0
  end
  if prime then
    primes[#primes + 1] = candidate
  end
end
local file = assert(io.open(arg[1], "w"))
file:write(_VERSION, " counts ", #primes, " primes below 50: ", table.concat(primes, " "), "\n")
file:close()
print("wrote " .. arg[1])
