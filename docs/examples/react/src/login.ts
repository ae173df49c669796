// Replace this with your login. A user needs a token with the scope `jobs:own`; a server without
// authentication needs none.

export function authorization(): Record<string, string> {
  const token = localStorage.getItem("token");
  return token ? { authorization: `Bearer ${token}` } : {};
}
