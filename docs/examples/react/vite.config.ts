import react from "@vitejs/plugin-react";
import { defineConfig } from "vite";

// The page and the server have one origin, here and behind the proxy of a deployment.
const server = process.env.SERVER ?? "http://127.0.0.1:8000";

export default defineConfig({
  plugins: [react()],
  server: { proxy: { "/graphql": { target: server, ws: true }, "/assets": server } },
  // `/assets` is the server's.
  build: { assetsDir: "static" },
});
