import react from "@vitejs/plugin-react";
import { defineConfig } from "vite";

// The page and the server have the same origin, here and behind a proxy in production.
const server = process.env.SERVER ?? "http://127.0.0.1:8000";

export default defineConfig({
  plugins: [react()],
  server: { proxy: { "/graphql": { target: server, ws: true }, "/assets": server } },
  // `/assets` is a path of the server.
  build: { assetsDir: "static" },
});
